"""What a student learns from its teacher: one file, one kind."""
