"""The values that cross a border: what a job asks for, what is planned, generated, written and reported. No I/O."""
