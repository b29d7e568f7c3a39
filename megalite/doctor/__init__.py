"""What a machine, or all nodes of a job, can do and what is wrong with them, before a run finds out."""
