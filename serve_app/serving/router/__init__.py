"""The router: takes the requests of one location and decides where each of them runs."""
