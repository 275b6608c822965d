"""What strangers wrote: how much memory it may take, and how it is shown, as text."""
