"""Starting runs on 1 to N nodes: torchrun, deepspeed, Slurm; checks before the start."""
