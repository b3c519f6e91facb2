"""Students that leave: exported, checked, and used without this package."""
