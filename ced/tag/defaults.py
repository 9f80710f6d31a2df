"""What is kept of scores where nothing else is asked for, on the command line as over HTTP; imports nothing."""

TOP_K = 3  # classes of a window, where no threshold is given
EVENT_THRESHOLD = 0.5  # of events, which need one
