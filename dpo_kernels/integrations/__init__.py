"""One line to switch for users of TRL and Liger; each module imports only what it replaces."""
