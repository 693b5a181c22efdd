// Command agent runs in the containers of the end-to-end tests, whose images have no
// shell. Each verb prints one JSON value, or several, one a line.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "agent:", err)
		os.Exit(1)
	}
}

// verbs are the commands with the number of their arguments.
var verbs = map[string]struct {
	arguments int
	run       func(ctx context.Context, args []string) (any, error)
}{
	"connections": {0, connections},
	"serve":       {0, serve},
	"copy":        {2, fetch},
	"flow":        {1, flow},
	"get":         {2, get},
	"leaf":        {2, leaf},
	"route":       {2, addRoute},
	"kill":        {1, kill},
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New("no verb; name one")
	}
	verb, ok := verbs[args[0]]
	if !ok || len(args)-1 != verb.arguments {
		return fmt.Errorf("unknown verb or wrong number of arguments (got %q)", args)
	}
	answer, err := verb.run(ctx, args[1:])
	if err != nil || answer == nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(answer)
}

// kill sends SIGKILL to a process: `kill PID`.
func kill(_ context.Context, args []string) (any, error) {
	pid, err := strconv.Atoi(args[0])
	if err != nil {
		return nil, err
	}
	return nil, syscall.Kill(pid, syscall.SIGKILL)
}
