#!/usr/bin/perl
# One attempt to connect over TCP: try HOST PORT [FROM [SECONDS]]. Says from which address, or why not. With AGAIN set, one after the other.
use strict;
use warnings;
use IO::Socket::IP;

my ($host, $port, $from, $seconds) = @ARGV;
$| = 1;
while (1) {
    my $socket = IO::Socket::IP->new(
        PeerHost => $host, PeerPort => $port, Proto => 'tcp', Timeout => $seconds || 3, $from ? (LocalHost => $from) : (),
    );
    print $socket ? 'from ' . $socket->sockhost : "no: $@", "\n";
    exit !$socket if !$ENV{AGAIN};
    select undef, undef, undef, 0.02;
}
