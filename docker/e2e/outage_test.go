//go:build e2e

package e2e

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

const (
	longest  = 15.0             // longest outage, in seconds
	theSame  = 2.0              // longest difference to upstream's outage, in seconds
	settling = 11 * time.Second // runtime after which Docker restarts a container without delay
)

// outageOnce interrupts the relay during a transfer, once in each way.
func outageOnce(t *testing.T, r *row) { outage(t, r, 1) }

// outageMedian interrupts it five times in each way.
func outageMedian(t *testing.T, r *row) { outage(t, r, 5) }

// outage measures the silence between two nodes when their only relay is restarted,
// killed, or replaced by a container with a newer image. It measures derpd first, then
// upstream's derper with the same nodes and map.
func outage(t *testing.T, r *row, rounds int) {
	w := newWorld(t, r)
	own := newAuthority(t)
	own.saveRoot(w, "roots/roots.pem")
	own.issue(w, relayName, relayName, time.Hour)
	images := map[string][2]string{
		"relay":  {image(), w.newer(image(), "relay-next")},
		"derper": {peersImage(t), w.newer(peersImage(t), "derper-next")},
	}
	describe := map[string]func(tag string){
		"relay": func(tag string) {
			w.addRelay(manualRelay(w, relay{name: "relay", hostName: relayName, more: "    image: " + tag + "\n"}))
		},
		"derper": func(tag string) { w.services["derper"] = derper(w, tag) },
	}
	describe["relay"](images["relay"][0])
	w.start("relay")
	w.startControl(w.headscaleMap("relay"))
	w.join("a", "b")

	ways := []string{"restarted", "killed", "recreated"}
	figures := make(map[string]map[string][]float64)
	for _, service := range []string{"relay", "derper"} {
		if service == "derper" {
			w.must(t, "rm", "--stop", "--force", "relay")
			describe["derper"](images["derper"][0])
			w.start("derper")
		}
		w.carries(900, "derpd")
		figures[service] = make(map[string][]float64)
		for i := range rounds {
			for _, way := range ways {
				process := w.process(service)
				transfer := w.begin("a", "b")
				switch way {
				case "restarted":
					docker(t, "restart", w.container(service))
				case "killed":
					// Docker delays the restart of a container that ran only briefly.
					w.ranFor(service, settling)
					w.kill(process)
				case "recreated":
					describe[service](images[service][(i+1)%2])
					w.start(service)
				}
				end := transfer.finish()
				if w.process(service) == process {
					t.Errorf("%s was not %s", service, way)
				}
				t.Logf("%s %s: no TCP for %.2f s, no UDP for %.2f s", service, way, end.TCPSilence, end.UDPSilence)
				if service == "relay" && end.TCPSilence > longest {
					t.Errorf("%s: no traffic for %.1f s", way, end.TCPSilence)
				}
				figures[service][way] = append(figures[service][way], end.TCPSilence)
			}
		}
	}
	for _, way := range ways {
		ours, upstreams := median(figures["relay"][way]), median(figures["derper"][way])
		w.saw("%s: %.2f s, derper %.2f s", way, ours, upstreams)
		if rounds > 1 && ours > upstreams+theSame {
			t.Errorf("%s: %.2f s without traffic, with derper %.2f s", way, ours, upstreams)
		}
	}
}

func median[T cmp.Ordered](list []T) T {
	return slices.Sorted(slices.Values(list))[len(list)/2]
}

// derper describes upstream's relay with the certificate of the world, in place of
// derpd.
func derper(w *world, tag string) string {
	w.volumes = append(w.volumes, "data-derper")
	return fmt.Sprintf(`
    image: %s
    entrypoint: [/bin/derper, -hostname=%s, -certmode=manual, -certdir=/etc/certs, -c=/var/lib/derper/derper.key]
    restart: unless-stopped
    networks: {a: {aliases: [%[2]s]}, b: {aliases: [%[2]s]}}
    volumes: ["%s:/etc/certs:ro", "data-derper:/var/lib/derper"]
`, tag, relayName, filepath.Join(w.dir, "certs"))
}

// newer creates an image that differs from another one by a label.
func (w *world) newer(tag, name string) string {
	w.t.Helper()
	name = prefix + strconv.Itoa(os.Getpid()) + "-" + name
	docker(w.t, "tag", derived(w.t, tag, "LABEL e2e=newer"), name)
	w.t.Cleanup(func() { _, _ = run(context.Background(), dockerTimeout, "rmi", name) })
	return name
}

// process returns the PID of a container's first process, as this machine counts.
func (w *world) process(service string) string {
	w.t.Helper()
	return docker(w.t, "inspect", "--format", "{{.State.Pid}}", w.container(service))
}

// ranFor waits until a container has run for this long.
func (w *world) ranFor(service string, long time.Duration) {
	w.t.Helper()
	started, err := time.Parse(time.RFC3339Nano, docker(w.t, "inspect", "--format", "{{.State.StartedAt}}", w.container(service)))
	if err != nil {
		w.t.Fatal(err)
	}
	select {
	case <-time.After(time.Until(started.Add(long))):
	case <-interrupted.Done():
		w.t.Fatal("interrupted")
	}
}

// kill kills a process as the kernel does when memory runs out. After `docker kill`,
// Docker would not restart the container.
func (w *world) kill(process string) {
	w.t.Helper()
	docker(w.t, "run", "--rm", "--label", ownerLabel+"="+project(w.t), "--pid=host", "--cap-drop=ALL", "--cap-add=KILL",
		"--network=none", peersImage(w.t), "/bin/agent", "kill", strings.TrimSpace(process))
}
