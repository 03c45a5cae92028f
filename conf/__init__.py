"""Hydra configuration: values only; the schema is flows/config.py."""
