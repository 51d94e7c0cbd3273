#!/usr/bin/perl
# A service whose socket systemd opened: says to each client from which address it came, and at which.
use strict;
use warnings;
use IO::Socket::IP;

my $server = IO::Socket::IP->new_from_fd(3, 'r+') or die "no socket was handed over: $!";
while (my $client = $server->accept) {
    print $client join(' ', map { s/^::ffff://r } $client->peerhost, $client->sockhost), "\n";
    close $client;
}
