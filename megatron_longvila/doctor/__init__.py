"""`python -m megatron_longvila.doctor`: what is live on the hosts of a job, and a remedy for every problem."""
