//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
	"tailscale.com/types/key"

	"derpd/internal/testrelay"
)

func init() {
	register(row{
		name: "disk-full", short: true, light: true, run: diskFull,
		attack: "the data directory is full after the start, and has room again before the stop",
	})
	register(row{
		name: "disk-read-only", short: true, light: true, run: diskReadOnly,
		attack: "the data directory becomes read-only after the start, and can be written again before the stop",
	})
}

// smallDisk is the size of a data directory, enough for a relay's files.
const smallDisk = "size=256k"

func diskFull(ctx context.Context, l *lab) ([]measured, error) {
	return l.withoutDisk(ctx, func(data string) (repair func() error, err error) {
		rubbish := filepath.Join(data, "rubbish")
		return func() error { return os.Remove(rubbish) }, fill(rubbish)
	}, "no space left on device")
}

func diskReadOnly(ctx context.Context, l *lab) ([]measured, error) {
	return l.withoutDisk(ctx, func(data string) (repair func() error, err error) {
		return func() error { return unix.Mount("", data, "", unix.MS_REMOUNT, smallDisk) },
			unix.Mount("", data, "", unix.MS_REMOUNT|unix.MS_RDONLY, smallDisk)
	}, "read-only file system")
}

// withoutDisk admits a member before and another one after the disk is spoiled.
func (l *lab) withoutDisk(ctx context.Context, spoil func(data string) (repair func() error, err error), cause string) ([]measured, error) {
	s, err := l.newSource(ctx, 0)
	if err != nil {
		return nil, err
	}
	sub, err := l.subject("data", "DERP_VERIFY_CLIENT_URL="+s.url, "DERP_VERIFY_INTERVAL=1s")
	if err != nil {
		return nil, err
	}
	if err := unix.Mount("tmpfs", sub.data, "tmpfs", 0, smallDisk); err != nil {
		return nil, notRun("this machine mounts no small file system: " + err.Error())
	}
	r, _, err := sub.start(ctx)
	if err != nil {
		return nil, err
	}
	before, err := r.shown(ctx)
	if err != nil {
		return nil, err
	}
	early, late := key.NewNode(), key.NewNode()
	s.admit(true, early.Public(), late.Public())
	if err := errors.Join(r.admits(ctx, early), sub.remembers(ctx, early.Public())); err != nil {
		return nil, err
	}
	repair, err := spoil(sub.data)
	if err != nil {
		return nil, fmt.Errorf("spoiling the disk: %w", err)
	}
	lateErr := r.admits(ctx, late)
	told := r.untilLogged(ctx, cause)
	readyErr := r.until(ctx, "ready", func(status int, _ string) bool { return status == 200 })
	earlyErr := sub.remembers(ctx, early.Public())

	// The source ends, so that the next process knows members by its file alone.
	if err := repair(); err != nil {
		return nil, err
	}
	s.stop()
	r.Stop()
	r, ready, startErr := sub.start(ctx)
	now, err := r.shown(ctx)
	if err != nil {
		return nil, err
	}
	afterwards := errors.Join(r.admitsSoon(ctx, early, knownWithin), r.admitsSoon(ctx, late, knownWithin))
	return []measured{
		promise("ready", readyErr == nil, "%s", timeOr(0, readyErr)),
		promise("a new member is admitted", lateErr == nil, "%s", timeOr(0, lateErr)),
		l.timely(promise("the log says "+cause, told == nil, "%s", timeOr(0, told))),
		promise("admitted nodes are not lost meanwhile", earlyErr == nil, "%s", timeOr(0, earlyErr)),
		promise("both members are in the file after the repair and a restart", startErr == nil && afterwards == nil, "%s", timeOr(ready, errors.Join(startErr, afterwards))),
		promise("the same node key and certificate", now.same(before), "%s", keptOr(now.same(before), "others")),
	}, nil
}

// same reports whether two relays are the same one for clients with a pin.
func (s shown) same(other shown) bool { return s.key == other.key && s.leaf.Equal(other.leaf) }

// untilLogged waits until the log has a text.
func (r life) untilLogged(ctx context.Context, text string) error {
	ctx, cancel := context.WithTimeout(ctx, savedWithin)
	defer cancel()
	for !r.logged(text) {
		if testrelay.Wait(ctx, 5*subjectEvery) != nil {
			return fmt.Errorf("not in the log: %s", text)
		}
	}
	return nil
}

// fill writes a file until its disk is full.
func fill(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	for err == nil {
		_, err = f.Write(make([]byte, 512))
	}
	if errors.Is(err, unix.ENOSPC) {
		return nil
	}
	return err
}
