"""What is there, what is missing and what is wrong, before anything is started."""
