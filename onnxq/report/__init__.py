"""What a result is worth and how it is shown: metrics, the closing table of a terminal, the HTML report."""
