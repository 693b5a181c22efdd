//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"tailscale.com/types/key"

	"derpd/internal/testrelay"
)

// ownNetwork prepares the network namespace of this process. It refuses the machine's
// own namespace.
func ownNetwork(ctx context.Context) error {
	devices, err := net.Interfaces()
	if err != nil {
		return err
	}
	for _, device := range devices {
		if device.Flags&net.FlagLoopback == 0 {
			return fmt.Errorf("--path: this network namespace has other devices (got %s); use an empty one, as root: unshare --net", device.Name)
		}
	}
	return ip(ctx, "link", "set", "lo", "up")
}

func ip(ctx context.Context, args ...string) error {
	if out, err := exec.CommandContext(ctx, "ip", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %q: %w: %s", args, err, out)
	}
	return nil
}

// Addresses of both ends, from the network for measurements (RFC 2544).
var (
	pathNear = netip.MustParseAddr("198.18.0.1")
	pathFar  = netip.MustParseAddr("198.18.0.2")
)

// link is one direction of a path.
type link struct {
	delay time.Duration // of each packet
	rate  float64       // bytes per second
	queue time.Duration // longest wait; packets that would wait longer are dropped
	loss  float64       // share of the other packets that are dropped
}

// path is a network device in each of two namespaces. This process carries packets
// from one to the other.
type path struct {
	down, up  link // from near to far, and back
	near, far *os.File
	work      chan func() // functions for the thread in the far namespace
}

func newPath(ctx context.Context, down, up link) (*path, error) {
	p := &path{down: down, up: up, work: make(chan func())}
	var err error
	if p.near, err = openDevice(ctx, pathNear); err != nil {
		return nil, err
	}
	context.AfterFunc(ctx, func() { close(p.work) })
	go func() {
		// Never unlocked, so the thread and its namespace end with this goroutine.
		runtime.LockOSThread()
		for f := range p.work {
			f()
		}
	}()
	err = p.inFar(func() (err error) {
		if err := os.NewSyscallError("unshare", unix.Unshare(unix.CLONE_NEWNET)); err != nil {
			return err
		}
		p.far, err = openDevice(ctx, pathFar)
		return err
	})
	if err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// inFar runs f in the far namespace.
func (p *path) inFar(f func() error) error {
	done := make(chan error)
	p.work <- func() { done <- f() }
	return <-done
}

// dial connects from the far end.
func (p *path) dial(ctx context.Context, s *server) (c *client, err error) {
	err = p.inFar(func() (err error) {
		// A socket belongs to the namespace of the thread that creates it. With
		// one address to dial, that is the calling thread.
		c, err = dial(ctx, s, key.NewNode(), pathFar, true)
		return err
	})
	return c, err
}

func (p *path) close() {
	_ = p.near.Close()
	if p.far != nil {
		_ = p.far.Close()
	}
}

// openDevice creates a network device in this thread's namespace. Reading the file
// returns the packets that the device sends. Writing makes the device receive packets.
func openDevice(ctx context.Context, addr netip.Addr) (*os.File, error) {
	const name = "path"
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: "/dev/net/tun", Err: err}
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		err = os.NewSyscallError("creating a network device", unix.IoctlIfreq(fd, unix.TUNSETIFF, request))
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	file := os.NewFile(uintptr(fd), name)
	for _, args := range [][]string{
		{"address", "add", netip.PrefixFrom(addr, 30).String(), "dev", name},
		{"link", "set", name, "up"},
	} {
		if err := ip(ctx, args...); err != nil {
			_ = file.Close()
			return nil, err
		}
	}
	return file, nil
}

// carry carries packets both ways until the devices are closed.
func (p *path) carry() error {
	var g errgroup.Group
	g.Go(func() error { return carry(p.near, p.far, p.down) })
	g.Go(func() error { return carry(p.far, p.near, p.up) })
	return g.Wait()
}

// parcel is a packet on the path.
type parcel struct {
	packet []byte
	due    time.Time
}

// carry carries packets from one device to the other.
func carry(from io.Reader, to io.Writer, l link) error {
	const longest = 64 << 10
	under := make(chan parcel, int(l.rate*(l.delay+l.queue).Seconds())/20) // IP packets have 20 bytes or more
	var g errgroup.Group
	g.Go(func() error {
		defer close(under)
		random := rand.New(rand.NewPCG(1, 2)) // same losses for both servers
		buffer := make([]byte, longest)
		var free time.Time // end of the last packet on the line
		for {
			n, err := from.Read(buffer)
			if err != nil {
				return err
			}
			now := time.Now()
			if free.Before(now) {
				free = now
			}
			if free.Sub(now) > l.queue || random.Float64() < l.loss {
				continue
			}
			free = free.Add(time.Duration(float64(n) / l.rate * float64(time.Second)))
			under <- parcel{append([]byte(nil), buffer[:n]...), free.Add(l.delay)}
		}
	})
	g.Go(func() error {
		for p := range under {
			if wait := time.Until(p.due); wait > 0 {
				testrelay.Pause(wait)
			}
			// EIO: the device is not up.
			if _, err := to.Write(p.packet); err != nil && !errors.Is(err, unix.EIO) {
				return err
			}
		}
		return nil
	})
	return g.Wait()
}
