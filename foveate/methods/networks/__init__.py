"""The modules of trained methods: what is learnt, without how it is used."""
