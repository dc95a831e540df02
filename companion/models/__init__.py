"""Energy-based models; each keeps the same verbs (`log_prob`, `gibbs`, `log_z`, ...)."""
