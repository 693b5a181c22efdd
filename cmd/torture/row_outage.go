//go:build linux

package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"tailscale.com/types/key"

	"derpd/internal/testkit/acmetest"
	"derpd/internal/testrelay"
)

func init() {
	register(row{
		name: "source-refuses", short: true, light: true, run: sourceRefuses,
		attack: "the admission URL refuses connections, and the relay is restarted meanwhile",
	})
	register(row{
		name: "source-silent", light: true, run: sourceSilent,
		attack: "the admission URL takes connections and never answers, and the relay is restarted meanwhile",
	})
	register(row{
		name: "dns-dead", light: true, run: dnsDead,
		attack: "no DNS server answers, the admission URL has a name, and the relay is restarted meanwhile",
	})
}

const (
	// knownWithin is the time in which a known member is admitted while the source
	// does not answer. A question to the URL takes up to 3 s, and waits for DNS.
	knownWithin = 5 * time.Second
	savedWithin = 5 * time.Second // of an admission in admitted.json
)

func sourceRefuses(ctx context.Context, l *lab) ([]measured, error) {
	s, err := l.newSource(ctx, 0)
	if err != nil {
		return nil, err
	}
	return l.withoutSource(ctx, s, s.url, s.stop)
}

func sourceSilent(ctx context.Context, l *lab) ([]measured, error) {
	s, err := l.newSource(ctx, 0)
	if err != nil {
		return nil, err
	}
	return l.withoutSource(ctx, s, s.url, func() { s.answer(time.Hour, 0) })
}

func dnsDead(ctx context.Context, l *lab) ([]measured, error) {
	// Both are of this row's namespaces.
	const server = "127.0.0.53"
	resolvers := filepath.Join(l.Dir, "resolv.conf")
	if err := os.WriteFile(resolvers, []byte("nameserver "+server+"\n"), 0o600); err != nil {
		return nil, err
	}
	if err := unix.Mount(resolvers, "/etc/resolv.conf", "", unix.MS_BIND, ""); err != nil {
		return nil, notRun("this machine mounts no resolv.conf: " + err.Error())
	}
	stop, err := acmetest.DNS(server + ":53")
	if err != nil {
		return nil, err
	}
	s, err := l.newSource(ctx, 0)
	if err != nil {
		return nil, err
	}
	return l.withoutSource(ctx, s, strings.Replace(s.url, "127.0.0.1", "verify.example.com", 1), func() {
		stop()
		s.server.SetKeepAlivesEnabled(false) // the relay has to look for the name
		silent, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(server), Port: 53})
		if err == nil {
			l.onClose(func() { _ = silent.Close() })
		}
	})
}

// withoutSource admits a member, ends the source, and connects the member again.
func (l *lab) withoutSource(ctx context.Context, s *source, url string, end func()) ([]measured, error) {
	sub, err := l.subject("data", "DERP_VERIFY_CLIENT_URL="+url, "DERP_VERIFY_INTERVAL=1s")
	if err != nil {
		return nil, err
	}
	r, _, err := sub.start(ctx)
	if err != nil {
		return nil, err
	}
	member := key.NewNode()
	s.admit(true, member.Public())
	if err := r.admits(ctx, member); err != nil {
		return nil, fmt.Errorf("the member is not admitted: %w", err)
	}
	before, err := r.shown(ctx)
	if err != nil {
		return nil, err
	}
	stays, err := testrelay.Dial(ctx, testrelay.Target{HTTPS: r.HTTPS, Certificate: before.leaf}, member, netip.Addr{})
	if err != nil {
		return nil, err
	}
	if err := sub.remembers(ctx, member.Public()); err != nil {
		return nil, err
	}

	l.say("the source ends")
	end()
	warned := r.until(ctx, "health warns of admission", func(_ int, text string) bool { return warns(text, "admission") })
	known := func(r life) (time.Duration, error) {
		begun := time.Now()
		err := r.admitsSoon(ctx, member, knownWithin)
		return time.Since(begun), err
	}
	took, knownErr := known(r)
	stranger := r.admits(ctx, key.NewNode())
	stayed := endsAfter(stays, time.Now(), time.Second)
	r.Stop()
	l.say("the relay starts again")
	r, ready, startErr := sub.start(ctx)
	tookAgain, againErr := known(r)
	strangerAgain := r.admits(ctx, key.NewNode())
	now, err := r.shown(ctx)
	if err != nil {
		return nil, err
	}
	return []measured{
		promise("a connected member stays", stayed >= time.Second, "%s", keptOr(stayed >= time.Second, "gone")),
		l.timely(promise("a member that was admitted before is admitted", knownErr == nil, "%s", timeOr(took, knownErr))),
		l.timely(promise("the same after a restart", againErr == nil, "%s", timeOr(tookAgain, againErr))),
		promise("a stranger is refused", stranger != nil && strangerAgain != nil, "%v, %v", refusal(stranger), refusal(strangerAgain)),
		promise("health warns of it", warned == nil, "%s", timeOr(0, warned)),
		l.timely(promise("ready after the restart within "+readyWithin.String(), startErr == nil && ready < readyWithin, "%s", timeOr(ready, startErr))),
		promise("the same node key and certificate after the restart", now.key == before.key && now.leaf.Equal(before.leaf), "%s", keptOr(now.key == before.key && now.leaf.Equal(before.leaf), "another")),
	}, nil
}

// warns reports whether a text of /readyz has a check that warns or fails.
func warns(text, check string) bool {
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) > 1 && (fields[0] == "warn" || fields[0] == "fail") && strings.Trim(fields[1], ":") == check {
			return true
		}
	}
	return false
}

// remembers waits until a node is in admitted.json.
func (s *subject) remembers(ctx context.Context, node key.NodePublic) error {
	ctx, cancel := context.WithTimeout(ctx, savedWithin)
	defer cancel()
	for {
		data, err := os.ReadFile(filepath.Join(s.data, "admitted.json"))
		if err == nil && strings.Contains(string(data), node.String()) {
			return nil
		}
		if testrelay.Wait(ctx, subjectEvery) != nil {
			return fmt.Errorf("the member is not in admitted.json after %v: %w", savedWithin, err)
		}
	}
}

// timeOr prints a time, or why there is none.
func timeOr(took time.Duration, err error) string {
	if err != nil {
		return firstLine(err.Error())
	}
	if took == 0 {
		return "yes"
	}
	return millis(took)
}

func refusal(err error) string {
	if err == nil {
		return "admitted"
	}
	return "refused"
}

// keptOr prints that a promise is kept, or what is instead.
func keptOr(isKept bool, instead string) string {
	if isKept {
		return "yes"
	}
	return instead
}
