"""Reading and writing files that are complete or absent. Knows formats, not what the content means."""
