"""What the wheel lays at the top of site-packages, and what ``HF_PACKFIX`` means."""
