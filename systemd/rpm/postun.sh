# $1: how many versions stay. The packages own files alone: at the last, their folders go, if nobody else has put something there.
systemctl daemon-reload >/dev/null 2>&1 || :
if [ "$1" -eq 0 ]; then
  rmdir /usr/share/doc/cloison /usr/share/doc/cloison-agent /usr/share/doc/cloison-coordinator >/dev/null 2>&1 || :
fi
