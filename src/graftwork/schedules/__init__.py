"""What happens over the course of a training, or in the place of one."""
