"""The trainer: reads a finished dataset, trains a student with FSDP2, exports it. No teacher and no vLLM runs here."""
