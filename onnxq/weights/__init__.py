"""What a weight can be besides codes times a scale: sums of codes, tables, one master for several widths."""
