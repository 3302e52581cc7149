"""What is done to a store as a whole or to one user: publish, import, export, erase, verify, collect."""
