"""Worker code: functions on tensors and tables, and plain classes that run a stage on one part. No Ray, no Hydra."""
