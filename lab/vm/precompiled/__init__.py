"""`import bcc` in a VM: see bcc/ here."""
