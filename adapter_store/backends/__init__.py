"""Where the bytes lie: a folder, memory or object storage."""
