"""How near each way of answering comes to what the user wrote: the ways side by side, on items that trained nothing."""
