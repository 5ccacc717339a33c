"""The playground in the browser: one question about one picture or clip, answered with all visual tokens and with fewer."""
