"""What a patch is: declared, examined, applied and reverted. Imports torch only when a wrapper runs."""
