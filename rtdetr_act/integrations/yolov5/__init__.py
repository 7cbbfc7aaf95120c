"""YOLOv5 and YOLOv7: hooks for a script of a checkout, put in place while the script runs and nowhere else."""
