"""What a method saves on this machine: interleaved runs, paired ratios with intervals, memory, and a ledger."""
