"""Driver programs: compose the config, order the stages, start the workers. No torch here."""
