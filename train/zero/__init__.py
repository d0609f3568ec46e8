"""What the DeepSpeed engine is made of: its configuration, ZeRO's partitions, its pipeline."""
