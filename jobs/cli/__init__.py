"""The `tokenmill` command: parse, call one function, print. A module for each group of commands."""

from jobs.cli import batch as batch
from jobs.cli import bench as bench
from jobs.cli import doctor as doctor
from jobs.cli import job as job
from jobs.cli import model as model
from jobs.cli import node as node
from jobs.cli import plan as plan
from jobs.cli import preflight as preflight
from jobs.cli import profiles as profiles
from jobs.cli import rehearse as rehearse
from jobs.cli import replay as replay
from jobs.cli import report as report
from jobs.cli import tune as tune
from jobs.cli.group import build_job as build_job
from jobs.cli.group import main as main
