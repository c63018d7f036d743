"""What learns: losses, optimisers, schedules and what is measured, under Lightning."""
