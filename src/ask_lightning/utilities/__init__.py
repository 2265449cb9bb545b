"""What every room uses: checks of arguments, ids, whole files, ranks, optional packages. No Trainer."""
