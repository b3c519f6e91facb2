"""A cache of teacher features, computed once and read again."""
