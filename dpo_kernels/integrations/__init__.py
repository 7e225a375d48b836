"""One line to switch for users of TRL and Liger: trl.py replaces a function of TRL, liger.py is Liger's class anew."""
