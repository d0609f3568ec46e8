"""What watches a run without changing it: progress, metrics on disk, MLflow."""
