"""Pictures and the self-contained HTML page that shows them. Imports nothing of ours but errors."""
