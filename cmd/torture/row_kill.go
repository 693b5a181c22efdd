//go:build linux

package main

import (
	"bytes"
	"context"
	cryptorand "crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"go4.org/mem"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"tailscale.com/types/key"

	"derpd/internal/testrelay"
)

func init() {
	register(row{
		name: "kill", short: true, light: true, limit: 20 * time.Minute, run: killOften,
		attack: "kill -9 at a random time or after a random change of a file, 200 times (20 with --short): during the start, the issuance of certificates and the writing of admitted nodes",
	})
}

const (
	longestLife  = 3 * time.Second
	longestDelay = time.Millisecond // after a change of a file
	forgetEvery  = 5                // lives; then everything is new
	oldMembers   = 40_000           // make admitted.json so long that its writing takes a while
	memberJoins  = 200 * time.Millisecond
	readyWithin  = 10 * time.Second
	shortestCert = 4 * time.Minute // certmagic renews a certificate so near its end at each start
)

// victim is a subject that is killed. Its files must stay whole.
type victim struct {
	*subject
	source *source
	first  []string            // beginnings of the names of files that only the first life writes
	later  []string            // those of files that every life writes
	files  map[string][]byte   // what must never change, by path; as first seen
	nodes  map[string]struct{} // of admitted.json, which must stay
	seen   shown

	kills, served, torn, issued int
	damage                      []string
}

func killOften(ctx context.Context, l *lab) ([]measured, error) {
	s, err := l.newSource(ctx, 0)
	if err != nil {
		return nil, err
	}
	const httpPort = 80 // of this row's namespace
	ca, env, err := l.authority(shortestCert, httpPort)
	if err == nil {
		err = ca.Serve(httpPort, 443)
	}
	if err != nil {
		return nil, err
	}
	admission := "DERP_VERIFY_CLIENT_URL=" + s.url
	const everyLife = "admitted.json"
	victims := []*victim{
		{first: []string{"node.key", "pinned.pem"}, later: []string{everyLife}},
		{first: []string{"node.key", "default.key"}, later: []string{everyLife, testrelay.Hostname}},
	}
	for i, env := range [][]string{{admission}, append(env, admission)} {
		if victims[i].subject, err = l.subject([]string{"pinned", "acme"}[i], env...); err != nil {
			return nil, err
		}
		victims[i].source = s
	}
	times := pick(l, 200, 20) / len(victims)
	g, gctx := errgroup.WithContext(ctx)
	for _, v := range victims {
		g.Go(func() error { return v.dieOften(gctx, times) })
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var lines []measured
	for _, v := range victims {
		name := filepath.Base(v.data)
		r, took, err := v.start(ctx)
		if err != nil {
			v.damage = append(v.damage, err.Error())
		} else if err := v.compare(ctx, r); err != nil {
			v.damage = append(v.damage, err.Error())
		}
		first := "nothing is lost"
		if len(v.damage) > 0 {
			first = fmt.Sprintf("%d faults, the first: %s", len(v.damage), v.damage[0])
		}
		lines = append(lines,
			promise(name+": node key, certificates, pin and admitted nodes are whole and the same after each kill", len(v.damage) == 0, "%s in %d kills", first, v.kills),
			l.timely(promise(name+": ready after the last kill within "+readyWithin.String(), err == nil && took < readyWithin, "%v", took.Round(time.Millisecond))),
			note(name+": lives that served clients, kills during a write, certificates issued, nodes in admitted.json", "%d, %d, %d, %d", v.served, v.torn, v.issued, len(v.nodes)))
	}
	return lines, nil
}

// forget empties the data directory but for admitted.json.
func (v *victim) forget() error {
	v.files, v.nodes, v.seen = map[string][]byte{}, map[string]struct{}{}, shown{}
	if err := errors.Join(os.RemoveAll(v.data), os.Mkdir(v.data, 0o700)); err != nil {
		return err
	}
	nodes := map[key.NodePublic]time.Time{}
	for range oldMembers {
		var raw [32]byte
		_, _ = cryptorand.Read(raw[:])
		nodes[key.NodePublicFromRaw32(mem.B(raw[:]))] = time.Now()
	}
	data, err := json.Marshal(nodes)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(v.data, "admitted.json"), data, 0o600)
}

// dieOften starts and kills the relay, and inspects its files after each kill. Every
// second kill follows a change of a file.
func (v *victim) dieOften(ctx context.Context, times int) error {
	for v.kills < times && ctx.Err() == nil {
		age := v.kills % forgetEvery
		if age == 0 {
			if err := v.forget(); err != nil {
				return err
			}
		}
		names, limit := v.later, longestLife
		if age == 0 {
			names = v.first
		}
		if v.kills%2 == 1 {
			names, limit = nil, rand.N(longestLife)
		}
		living, cancel := context.WithTimeout(ctx, limit)
		changed := make(chan error, 2)
		go func() { changed <- awaitChange(living, v.data, names) }()
		r, err := v.launch(ctx)
		if err != nil {
			cancel()
			return err
		}
		go func() { changed <- v.join(living, r) }()
		err = <-changed
		testrelay.Pause(max(0, rand.N(2*longestDelay)-longestDelay)) // none after half of the changes
		r.kill()
		cancel()
		if err := errors.Join(err, <-changed); err != nil {
			return err
		}
		v.kills++
		v.inspect()
	}
	return ctx.Err()
}

// join admits new members until the end of a life, so that the relay has something to
// write.
func (v *victim) join(ctx context.Context, r life) error {
	compared := false
	for testrelay.Wait(ctx, memberJoins) == nil {
		member := key.NewNode()
		v.source.admit(true, member.Public())
		if r.admits(ctx, member) != nil || compared {
			continue
		}
		v.served++
		// The kill may end the connection.
		if err := v.compare(ctx, r); errors.Is(err, errAnother) {
			v.damage = append(v.damage, err.Error())
		}
		compared = true
	}
	return nil
}

var errAnother = errors.New("the relay has another")

// compare compares what clients see with what they saw in an earlier life.
func (v *victim) compare(ctx context.Context, r life) error {
	now, err := r.shown(ctx)
	if err != nil {
		return err
	}
	before := v.seen
	v.seen = now
	pinned := filepath.Base(v.data) == "pinned"
	switch {
	case before.leaf == nil:
	case now.key != before.key:
		return fmt.Errorf("%w node key", errAnother)
	case pinned && !now.leaf.Equal(before.leaf):
		return fmt.Errorf("%w pinned certificate", errAnother)
	}
	return nil
}

// unfinished are files that are renamed once they are complete, and those with which
// certmagic tests its storage.
var unfinished = regexp.MustCompile(`^\d+$|\.tmp\d+$|^rw_test_\d+$`)

// inspect notes each file that is damaged, changed or lost.
func (v *victim) inspect() {
	fault := func(path, format string, args ...any) {
		v.damage = append(v.damage, fmt.Sprintf("kill %d: %s %s", v.kills, strings.TrimPrefix(path, v.data), fmt.Sprintf(format, args...)))
	}
	here := map[string]bool{}
	torn := false
	err := filepath.WalkDir(v.data, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if unfinished.MatchString(d.Name()) {
			torn = true
			return os.Remove(path)
		}
		here[path] = true
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		before, known := v.files[path]
		same := known && bytes.Equal(before, data)
		switch {
		case d.Name() == "admitted.json":
			v.inspectNodes(data, func(text string) { fault(path, "%s", text) })
		case strings.HasSuffix(path, ".pem") && strings.Contains(path, "/certificates/"):
			if _, err := tls.X509KeyPair(data, data); err != nil {
				fault(path, "is damaged: %v", err)
			}
			if !same {
				v.issued++
			}
		case strings.HasSuffix(path, ".json"):
			if !json.Valid(data) {
				fault(path, "is no JSON")
			}
		case known && !same, len(data) == 0:
			fault(path, "has changed")
		case d.Name() == "pinned.pem":
			if _, err := tls.X509KeyPair(data, data); err != nil {
				fault(path, "is damaged: %v", err)
			}
		}
		v.files[path] = data
		return nil
	})
	if err != nil {
		fault(v.data, "cannot be read: %v", err)
	}
	if torn {
		v.torn++
	}
	for path := range v.files {
		if !here[path] {
			fault(path, "is gone")
			delete(v.files, path)
		}
	}
}

// inspectNodes notes nodes that are missing from admitted.json.
func (v *victim) inspectNodes(data []byte, fault func(string)) {
	var nodes map[string]time.Time
	if err := json.Unmarshal(data, &nodes); err != nil {
		fault("is damaged: " + err.Error())
		return
	}
	missing := 0
	for node := range v.nodes {
		if _, ok := nodes[node]; !ok {
			missing++
		}
	}
	if missing > 0 {
		fault(fmt.Sprintf("lacks %d of %d nodes", missing, len(v.nodes)))
	}
	for node := range nodes {
		v.nodes[node] = struct{}{}
	}
}

// awaitChange returns after a change of a file below a directory whose name begins with
// one of names, or at the end of ctx.
func awaitChange(ctx context.Context, dir string, names []string) error {
	if len(names) == 0 {
		<-ctx.Done()
		return nil
	}
	watch, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return os.NewSyscallError("inotify_init", err)
	}
	defer func() { _ = unix.Close(watch) }()
	name := names[rand.IntN(len(names))]
	b := make([]byte, 4096)
	for ctx.Err() == nil {
		// Directories that are new are watched after the next change.
		_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				_, err = unix.InotifyAddWatch(watch, path, unix.IN_CREATE|unix.IN_MODIFY|unix.IN_MOVED_TO)
			}
			return err
		})
		if n, err := unix.Poll([]unix.PollFd{{Fd: int32(watch), Events: unix.POLLIN}}, 5); n <= 0 || err != nil {
			continue
		}
		// A name begins after the fixed part of an event.
		if n, err := unix.Read(watch, b); err == nil && bytes.Contains(b[:n], []byte("\x00"+name)) {
			return nil
		}
	}
	return nil
}
