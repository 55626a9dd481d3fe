"""What a run left behind: run folders read back, tables, figures and the HTML report."""
