"""Many runs of one recipe, and how sure their differences are."""
