"""What each command does, from recipe to files; only commands import each other."""
