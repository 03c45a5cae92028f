"""The embedded world: drawn scenes whose truth is known, and the small models that ship with the project."""
