"""What is done to a store or to one user: publish, import, export, erase, verify, gc, rotate."""
