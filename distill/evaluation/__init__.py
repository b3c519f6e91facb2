"""Students, teachers and timm models under one protocol."""
