"""The report of a job as a document: evidence from storage in, HTML and Markdown out."""
