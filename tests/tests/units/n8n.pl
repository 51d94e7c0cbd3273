#!/usr/bin/perl
# What stands for n8n: an HTTP service whose answers come from a database.
#   /db      asks it on a connection of its own, from which address it was asked
#   /held    asks it on the connection that stays open, which connection that is
#   /redis   asks its queue from which address it is asked
#   /try?... runs `try` with these arguments
use strict;
use warnings;
use IO::Socket::IP;
use IPC::Open2;

my $url = 'postgresql://n8n@postgres.cloison.internal/app?connect_timeout=3';
my $server = IO::Socket::IP->new(LocalHost => '::', LocalPort => 5678, Proto => 'tcp', Listen => 64, ReuseAddr => 1, V6Only => 0)
    or die "cannot listen: $@";
my ($held, $asked);
$SIG{PIPE} = 'IGNORE';

sub held {
    if (!$held) {
        open2(my $out, my $in, 'psql', '-XAtq', $url);
        $in->autoflush(1);
        ($held, $asked) = ($out, $in);
    }
    print $asked "select pg_backend_pid() || ' ' || host(inet_client_addr());\n";
    my $answer = <$held>;
    ($held, $asked) = () if !defined $answer;
    return $answer // '';
}

sub redis {
    my $redis = IO::Socket::IP->new(PeerHost => 'redis.cloison.internal', PeerPort => 6379, Proto => 'tcp', Timeout => 3)
        or return "no: $@";
    print $redis "CLIENT INFO\r\n";
    my ($length, $info) = (scalar <$redis>, scalar <$redis>);
    return ($info // '') =~ /\baddr=\[?([0-9a-f.:]+?)\]?:\d+ / ? $1 : 'no: ' . ($length // 'no answer');
}

while (1) {
    my $client = $server->accept or next;
    my $line = <$client> // '';
    while (my $header = <$client>) { last if $header =~ /^\r?\n/ }
    my ($path, $arguments) = $line =~ m{^GET (/\w+)\??(\S*)} or next;
    my $answer =
          $path eq '/db' ? `psql -XAtqc 'select host(inet_client_addr())' '$url' 2>&1`
        : $path eq '/held' ? held()
        : $path eq '/redis' ? redis()
        : $path eq '/try' ? do { my @words = split /,/, $arguments; `/usr/local/bin/try @words 2>&1` }
        :                   '';
    print $client "HTTP/1.0 200 OK\r\nConnection: close\r\n\r\n$answer";
    close $client;
}
